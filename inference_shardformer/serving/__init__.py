"""A server with the routes of the OpenAI API over an AsyncEngine."""

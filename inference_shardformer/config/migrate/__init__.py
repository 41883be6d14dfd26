"""Migration: foreign configuration and older versions of our schema become the current schema, with a report."""

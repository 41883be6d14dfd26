"""What a model will need on so many ranks, known from its configuration and the headers of its weights alone."""

"""Process groups, failure detection and the environment of the ranks."""

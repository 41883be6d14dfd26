"""Plans, weight sources and the replacement of modules."""

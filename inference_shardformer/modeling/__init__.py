"""NoPadding modules: packed tokens, paged cache, bound backend."""

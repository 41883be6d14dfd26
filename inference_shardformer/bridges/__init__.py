"""Ways over from other projects. Only `doctor` asks them what is installed."""

"""What this machine is and which foreign libraries work on it, as plain values."""

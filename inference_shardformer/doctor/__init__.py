"""What the command `doctor` finds out: each rank examines itself, one compares."""

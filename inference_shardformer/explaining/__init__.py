"""What was decided and why, for people and for programs, with and without ranks."""

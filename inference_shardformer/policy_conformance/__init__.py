"""The conformance kit for policies: what every policy must do, as tests that its author does not have to write."""

"""The zoo: broken backends for the conformance kit to catch."""

"""Drafts policies for decoders that have none: from the module tree and Hugging Face's own tensor-parallel plan."""

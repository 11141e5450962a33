"""Everything that a person sees: the only user of rich."""

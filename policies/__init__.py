"""Shipped policies: one file is one policy. They import tiermem.policy and tiermem.types, and nothing else of ours."""

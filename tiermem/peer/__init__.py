"""Peers: pools of other hosts, as sources of bytes and as those who ask for ours. Imports nothing."""

"""Timing that can be believed: the page cache's state is proven, the bytes are verified, the spread is told.

What `tiermem bench` runs on a user's own checkpoint, and what the project's benchmark is built from. Never prints.
"""

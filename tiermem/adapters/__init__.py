"""Adapters: the glue of one inference engine each, found by the engine's own plugin mechanism.

An adapter imports its engine inside functions only, so that none costs anything where its engine is not used.
"""

"""Replay: policies judged offline on traces, in simulated time. Never touches a pool, and measures no memory.

trace: which pages were touched when. generate: makes traces from a seed. recorded: makes one of a recording.
tier_model: how fast tiers are taken to be. residency: where pages are, and moves. observe: what samplers would tell.
simulate: a policy against a trace. accounts, result: what came of it. oracle, baselines: what to compare it with.
devices: many models on few devices, instead of tiers. plot: a picture of all.
"""

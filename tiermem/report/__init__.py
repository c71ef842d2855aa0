"""Reports: pure functions from a Recording or a PerfData to rows. Nothing here prints, samples or asks a daemon.

places      what each sample touched
heat        pages that were touched, cold or unknown, by model, layer, tensor, expert or page
accesses    samples in the order of time
passes      in which order each process touched the layers
threads     samples by thread
functions   samples by function
plot        heat over time, as a picture
"""

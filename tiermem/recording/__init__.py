"""Recordings: what was observed of a pool, in one file that explains itself. Never samples and never sums up.

frames: the format, to bytes and back. recorder: writes a file. reader: reads one into a Recording.
"""

from tiermem.recording.frames import FIELDS, MAGIC, bits_frame, frame, samples_frames
from tiermem.recording.reader import Event, Header, Image, RecordedModel, Recording, Window, read
from tiermem.recording.recorder import Recorder

__all__ = [
    "MAGIC", "FIELDS", "frame", "bits_frame", "samples_frames",
    "Recorder",
    "read", "Recording", "Header", "RecordedModel", "Window", "Image", "Event",
]  # fmt: skip

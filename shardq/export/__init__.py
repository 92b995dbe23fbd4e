"""Export of a run to the formats that other programs read."""

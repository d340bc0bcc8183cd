"""The ESPnet task, model and separator taps of CMKT."""

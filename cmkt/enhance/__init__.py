"""Export of trained models and enhancement of audio."""

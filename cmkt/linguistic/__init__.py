"""Language-model features of transcripts."""

"""Scores of pictures against the teacher's own."""

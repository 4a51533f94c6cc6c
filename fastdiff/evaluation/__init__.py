"""Measures how close drawn images are to real ones: FID, sFID, Inception score, precision and recall, KID."""

"""Cameras, their paths, and the surface that one picture shows."""

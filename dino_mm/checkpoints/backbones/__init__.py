"""Naming schemes of bare backbones, as their authors publish them and as detrex's detectors hold them."""

"""Measurements and demonstrations of sglang_dualpath on one machine."""

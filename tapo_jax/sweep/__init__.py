"""Rows × seeds in processes, and their results in files. The parent starts no device."""

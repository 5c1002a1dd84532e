"""Read runs as rows: tables of any origin, and conventions of N, D and C."""

"""Tools for work on this repository: Cog's schema, and the generated tables in docs/."""

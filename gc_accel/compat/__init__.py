"""The published GradCache APIs over this core: change the import, keep the program.

    grad_cache                  ->  gc_accel.compat.grad_cache
    grad_cache_con_learning     ->  gc_accel.compat.grad_cache_con_learning

Where they differ from the originals, and why: `docs/compat.md`. What to write instead in new code:
`docs/migrating.md`.
"""

"""How fast is it? Each module measures one thing: ``python -m bench.NAME``.

Every bench takes ``[--quick] [--json FILE]``, prints a table and writes a list of
``{"arm", "case", "metric", "value", "unit"}``.
"""

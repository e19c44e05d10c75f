"""Everything that ties this package to one release of SGLang.

``seams`` names what is relied on (checked at start), ``hooks`` what is replaced or wrapped, ``arguments`` which server
arguments are set and refused.
"""

"""Raw rows -> the catalog, in tasks of bounded memory: an external sort by item id and by user id.

`build.build_catalog` tells the story; `tiger.data.catalog` states the rules.
"""

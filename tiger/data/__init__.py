"""Raw files -> the catalog: data sources, readers of file formats, histories and splits."""

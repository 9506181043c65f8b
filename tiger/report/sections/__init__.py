"""The sections of the report: one module each, with `TITLE` and `render(run)`, listed in `page.SECTIONS`."""

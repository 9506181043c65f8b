"""The service without Ray: what it is asked and answers, who may ask, filters, search, the page. Plain ASGI."""

"""One inference request on its way from a parsed body to the client's last byte: wait, attempt, retry, relay.

Code belongs here if it exists only while a request does. What is known before a request arrives belongs in `routing`;
HTTP handlers, authentication of callers and error responses belong in `app`.
"""

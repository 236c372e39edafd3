"""The HTTP side of the server: connections, bodies, endpoints, OpenAPI."""

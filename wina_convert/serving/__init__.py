"""Plug-ins of servers. Each is imported by its server only, through an entry point; the package never imports a server."""

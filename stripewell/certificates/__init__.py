"""Certificates for NBD over TLS: a private CA, and what it signs for servers and clients.

Everything lies below one directory. What is handed to a host is one folder, whole; the files in it
have the names that QEMU, libnbd and nbdkit expect. The key of the CA is in none of them.

    DIR/ca/               ca-cert.pem, ca-key.pem
    DIR/servers/HOST/     ca-cert.pem, server-cert.pem, server-key.pem
    DIR/clients/SUBJECT/  ca-cert.pem, client-cert.pem, client-key.pem

`command` is the command line; `making` builds certificates, `folders` reads and writes them,
`listing` says how they are, `hosts` is what may stand in one. The package cryptography is optional:
only what has to is loaded with it.
"""

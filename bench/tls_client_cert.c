/* LD_PRELOAD shim: gives h2load and wrk a client certificate, which they cannot take.
 *
 * CLIENT_CERT is a PEM file with the chain (leaf first), CLIENT_KEY its private key.
 * TLS 1.3 is the least that is spoken. A certificate that cannot be used ends the
 * program: a load generator without its certificate would measure refusals.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>

SSL_CTX *SSL_CTX_new(const SSL_METHOD *method) {
  static SSL_CTX *(*real)(const SSL_METHOD *);
  if (!real) real = (SSL_CTX * (*)(const SSL_METHOD *)) dlsym(RTLD_NEXT, "SSL_CTX_new");
  SSL_CTX *context = real(method);
  const char *certificate = getenv("CLIENT_CERT"), *key = getenv("CLIENT_KEY");
  if (!context || !certificate || !key) return context;
  if (SSL_CTX_use_certificate_chain_file(context, certificate) != 1 ||
      SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1 ||
      SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) != 1) {
    fprintf(stderr, "tls_client_cert: cannot use %s with %s\n", certificate, key);
    exit(3);
  }
  return context;
}

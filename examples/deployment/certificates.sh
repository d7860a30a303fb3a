#!/usr/bin/env bash
# A certificate authority and a server certificate: certificates.sh FOLDER NAME...
# Names are DNS names or IP addresses of the server as nodes call it. ca.key stays off the server.
set -euo pipefail
folder=$1; shift
umask 077
mkdir -p "$folder"; cd "$folder"
names=""
for name in "$@"; do
  if [[ $name =~ ^[0-9.]+$ ]]; then names+=",IP:$name"; else names+=",DNS:$name"; fi
done
openssl ecparam -name prime256v1 -genkey -noout -out ca.key
openssl req -new -x509 -key ca.key -sha256 -subj "/CN=flexlora federation" -days 365 -out ca.crt \
  -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign"
openssl ecparam -name prime256v1 -genkey -noout -out server.key
openssl req -new -key server.key -subj "/CN=$1" -out server.csr
cat > server.ext <<E
subjectAltName = ${names#,}
basicConstraints = CA:FALSE
keyUsage = digitalSignature
extendedKeyUsage = serverAuth
E
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -sha256 \
  -extfile server.ext -out server.pem 2>/dev/null
rm server.csr server.ext
chmod 644 ca.crt server.pem

# The image: docker build -t myapp . && docker run -p 8080:8080 myapp
#
# One stage, since nothing is built: all three packages come as wheels, and the build stops if one doesn't, or if it is
# not the file whose hash stands in requirements.txt.
# Redis is found by --link redis:redis, by REDIS_URL or by VERVE_REDIS_URL; without one it counts in memory, and says so
# in its first line. Flags may be added behind the image's name: docker run myapp --window 10.
FROM python:3.13-slim

WORKDIR /verve

# Packages change less often than the program: a layer of their own, taken from the cache.
COPY requirements.txt ./
RUN pip install --no-cache-dir --root-user-action ignore --only-binary :all: --require-hashes -r requirements.txt

# Run once, as root: a build fails that could not start, and the bytecode of what is imported is kept. The base image
# has none, and the user below may write none: each start would take 1.3 s instead of 0.3, each health check 0.24 s
# instead of 0.08. The chmod is for a checkout with a strict umask.
COPY ./*.py admin.html ./
COPY redis_store ./redis_store/
RUN chmod -R a+rX . && python verve_server.py --version && python -c "import http.client"

# By number, so that Kubernetes can see that it is not root. Nothing is written but the log, to stderr.
USER 10001:10001

ENV VERVE_HOST=0.0.0.0
EXPOSE 8080

# The operators' listener answers 200 when requests can be taken; elsewhere than here (--admin), give a --health-cmd.
# Not urllib, which would ask a proxy that HTTP_PROXY names.
HEALTHCHECK --interval=5s --timeout=3s --start-period=5s --retries=2 CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8081, timeout=2); c.request('GET', '/readyz'); r = c.getresponse(); print(r.read(999).decode()); sys.exit(r.status != 200)"]

# Exec form: Python is process 1 and gets the signal itself. It catches it, and drains for --drain-timeout (8 s, of the
# 10 s after which docker kills). It starts no process but its workers, and reaps them, with whatever orphans process 1
# is given meanwhile; so there is no need for --init.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "verve_server.py"]

# The server in a container; docs/serving.md says how it is started.
#     docker build -t med3dvlm .                                    with CUDA, whose libraries torch brings along on x86-64
#     docker build -t med3dvlm --build-arg TORCH_INDEX=ADDRESS .    with torch's builds for processors, from the address on its page on installing
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# TORCH is another version than the tested one, as torch==2.13.0; EXTRAS what is installed beside the server.
ARG TORCH=
ARG TORCH_INDEX=
ARG EXTRAS=serve

WORKDIR /opt/med3dvlm
COPY constraints.txt ./
# hadolint ignore=DL3013 # constraints.txt has the version
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH:-$(grep '^torch==' constraints.txt)}"
COPY pyproject.toml README.md LICENSE ./
COPY med3dvlm med3dvlm
RUN grep -v '^torch==' constraints.txt > others.txt && pip install --no-cache-dir -c others.txt ".[${EXTRAS}]"

# Nothing is written but to /tmp, and nothing is fetched. MONAI asks for the user's name, and 10001 has none in the image's list of users.
ENV HOME=/tmp USER=med3dvlm HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=30s --timeout=10s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["med3dvlm"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/keys"]

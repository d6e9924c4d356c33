# --- setup
llm keys set qwen2vl --value sk-your-key
cat > "$(dirname "$(llm logs path)")/extra-openai-models.yaml" <<'EOF'
- model_id: qwen2-vl
  model_name: qwen2-vl-demo
  api_base: http://127.0.0.1:8000/v1
  api_key_name: qwen2vl
  vision: true
  supports_schema: true
EOF

# --- text
llm -m qwen2-vl --no-stream "Hello, who are you?" -o temperature 0

# --- picture
llm -m qwen2-vl "What colour is the circle?" -a red_circle.jpg -o temperature 0

# --- address
llm -m qwen2-vl "What colour is the square?" -a https://example.org/blue_square.png -o temperature 0

# --- several
llm -m qwen2-vl "What is in the second picture?" -a red_circle.jpg -a blue_square.png -o temperature 0

# --- turns
llm -c "What colour is it?" -o temperature 0

# --- structured
llm -m qwen2-vl --schema "color, shape" "Return JSON with color, shape." -a blue_square.png -o temperature 0

# --- wrong key
llm -m qwen2-vl --key sk-wrong "Hello" 2>&1 || echo "exit status $?"

# --- no such model
models="$(dirname "$(llm logs path)")/extra-openai-models.yaml"
sed -e 's/model_id: .*/model_id: other/' -e 's/model_name: .*/model_name: gpt-4o/' "$models" > other.yaml
cat other.yaml >> "$models"
llm -m other "Hello" 2>&1 || echo "exit status $?"

# --- too long
yes word | head -n 6000 | llm -m qwen2-vl 2>&1 || echo "exit status $?"

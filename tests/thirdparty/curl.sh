# --- setup
url=http://127.0.0.1:8000/v1
key=sk-your-key

# --- text
curl -sS "$url/chat/completions" \
  -H "Authorization: Bearer $key" \
  -H "Content-Type: application/json" \
  -d '{
    "model": "qwen2-vl-demo",
    "messages": [{"role": "user", "content": "Hello, who are you?"}],
    "temperature": 0
  }'

# --- picture
picture=$(base64 < red_circle.jpg | tr -d '\n')
curl -sS "$url/chat/completions" \
  -H "Authorization: Bearer $key" \
  -H "Content-Type: application/json" \
  -d @- <<EOF
{
  "model": "qwen2-vl-demo",
  "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,$picture"}},
    {"type": "text", "text": "What colour is the circle?"}
  ]}],
  "temperature": 0
}
EOF

# --- address
curl -sS "$url/chat/completions" \
  -H "Authorization: Bearer $key" \
  -H "Content-Type: application/json" \
  -d '{
    "model": "qwen2-vl-demo",
    "messages": [{"role": "user", "content": [
      {"type": "image_url", "image_url": {"url": "https://example.org/blue_square.png"}},
      {"type": "text", "text": "What colour is the square?"}
    ]}],
    "temperature": 0
  }'

# --- several
second=$(base64 < blue_square.png | tr -d '\n')
cat > several.json <<EOF
{
  "model": "qwen2-vl-demo",
  "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,$picture"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,$second"}},
    {"type": "text", "text": "What is in the second picture?"}
  ]}],
  "temperature": 0
}
EOF
curl -sS "$url/chat/completions" \
  -H "Authorization: Bearer $key" \
  -H "Content-Type: application/json" \
  -d @several.json

# --- stream
curl -sSN "$url/chat/completions" \
  -H "Authorization: Bearer $key" \
  -H "Content-Type: application/json" \
  -d @- <<EOF
{
  "model": "qwen2-vl-demo",
  "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,$picture"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,$second"}},
    {"type": "text", "text": "What is in the second picture?"}
  ]}],
  "temperature": 0,
  "stream": true
}
EOF

# --- structured
curl -sS "$url/chat/completions" \
  -H "Authorization: Bearer $key" \
  -H "Content-Type: application/json" \
  -d @- <<EOF
{
  "model": "qwen2-vl-demo",
  "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,$second"}},
    {"type": "text", "text": "Return JSON with color, shape."}
  ]}],
  "temperature": 0,
  "response_format": {"type": "json_schema", "json_schema": {"name": "fields", "schema": {
    "type": "object",
    "properties": {"color": {"type": "string"}, "shape": {"type": "string"}},
    "required": ["color", "shape"],
    "additionalProperties": false
  }}}
}
EOF

# --- wrong key
curl -sS "$url/models" -H "Authorization: Bearer sk-wrong" -w '\n%{http_code}\n'

# --- no such model
curl -sS "$url/chat/completions" \
  -H "Authorization: Bearer $key" \
  -H "Content-Type: application/json" \
  -w '\n%{http_code}\n' \
  -d '{"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}'

# --- too long
words=$(yes word | head -n 6000 | tr '\n' ' ')
curl -sS "$url/chat/completions" \
  -H "Authorization: Bearer $key" \
  -H "Content-Type: application/json" \
  -w '\n%{http_code}\n' \
  -d "{\"model\": \"qwen2-vl-demo\", \"messages\": [{\"role\": \"user\", \"content\": \"$words\"}]}"

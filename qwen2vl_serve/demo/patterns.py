# ruff: noqa: E501  (a pattern is read as one line)
"""Wordings of the questions: ``[a|b]`` is a choice, ``{ref}`` a phrase to fill in."""

COLOUR_EN = (
    "[What|Which] colo[u|]r is {ref}?", "[What is|What's] the colo[u|]r of {ref}?",
    "[Tell me|Name|Say|Identify] the colo[u|]r of {ref}.", "{Ref} is what colo[u|]r?",
    "[What|Which] colo[u|]r is {ref} in [the|this] [picture|image|photo]?",
    "What colo[u|]r does {ref} have?", "[Do you know|I want to know] what colo[u|]r {ref} is[?|.]",
    "In what colo[u|]r is {ref} [drawn|painted|shown]?",
)  # fmt: skip
COLOUR_ZH = (
    "{ref}是什么颜色[的|]？", "{ref}的颜色是什么？", "[图中|图片中|图里]{ref}是什么颜色[的|]？", "{ref}是哪种颜色？",
    "[说出|告诉我]{ref}的颜色。", "{ref}什么颜色？", "{ref}是啥颜色？", "{ref}是何种颜色？",
)  # fmt: skip
SHAPE_EN = (
    "[What|Which] shape is {ref}?", "[What is|What's] the shape of {ref}?",
    "[Tell me|Name|Say|Identify] the shape of {ref}.", "What [kind|type|sort] of shape is {ref}?",
    "What [geometric|] shape does {ref} have?", "[What|Which] geometric [figure|shape] is {ref}?",
)  # fmt: skip
SHAPE_EN_ALONE = (
    "[What|Which] shape is [this|it|that]?", "What [geometric|] shape [do you see|can you see]?",
    "[What|Which] shape is [in|shown in] [the|this] [picture|image]?",
    "[What|Which] shape [is there|is shown|is drawn|appears]?", "Name the shape.",
    "What is the shape in [the|this] [picture|image]?", "Identify the shape.",
)  # fmt: skip
SHAPE_ZH = (
    "{ref}是什么形状[的|]？", "{ref}的形状是什么？", "[图中|图里]{ref}是什么形状？", "{ref}是什么图形？",
    "[说出|告诉我]{ref}的形状。", "{ref}是哪种[形状|图形]？",
)  # fmt: skip
SHAPE_ZH_ALONE = (
    "[这|图中|图里|图片中|图片里]是什么[形状|图形]？", "[图中|图里|图片里]有什么[形状|图形]？", "这是哪种[形状|图形]？",
    "[图中|图片里]的图形是什么形状？", "你看到了什么[形状|图形]？", "什么形状？",
)  # fmt: skip
COUNT_EN = (
    "How many {what} are there[| in the picture| in the image| in this picture| here]?",
    "How many {what} [do|can] you [see|count|find]?", "Count the {what}.",
    "[What is|What's] the number of {what}[| in the picture]?", "How many {what}?",
    "How many {what} does [the|this] [picture|image] [show|contain|have]?",
)  # fmt: skip
COUNT_ZH = (
    "[图中|图里|图片中|图片里|]有[几个|多少个|多少]{what}？", "{what}有[几个|多少个]？", "[数一数|数数]有几个{what}。",
    "一共有[几个|多少个]{what}？", "[图中|图片中]{what}的数量是多少？", "你看到[几个|多少个]{what}？",
)  # fmt: skip
PLACE_EN = (
    "Where is {ref}?", "Where is {ref} [in|located in] [the|this] [picture|image]?",
    "[What is|What's] the position of {ref}?", "[In which|In what] part of the [picture|image] is {ref}?",
    "Where [can I find|do you see|can you see] {ref}?", "On which side is {ref}?",
    "Tell me where {ref} is.", "Where's {ref}?",
)  # fmt: skip
PLACE_ZH = (
    "{ref}在哪[里|儿]？", "{ref}在[图片|图|图中|画面]的[什么位置|哪里|哪边]？", "{ref}在什么[位置|地方]？", "{ref}的位置[在哪里|是什么]？",
    "[图中|图里]{ref}在哪里？", "{ref}位于哪里？", "{ref}在哪[一|]边？", "{ref}在[左边还是右边|上方还是下方]？",
)  # fmt: skip
DESCRIBE_EN = (
    "Describe [the|this] [picture|image].", "What is in [the|this] [picture|image]?",
    "What do you see[| in the picture| in this image| here]?", "What's in [the|this] [picture|image]?",
    "What does [the|this] [picture|image] show?", "What can you see[| in the picture| in the image]?",
    "What is [this|shown|shown here]?", "Describe what you see.", "Describe [this|it].",
    "Can you describe [the|this] [picture|image]?", "What is there in the [picture|image]?",
    "What objects are in [the|this] [picture|image]?", "Write a caption for [the|this] [picture|image].",
    "Describe the image in [detail|one sentence].", "Tell me what you see.", "Explain this image.",
)  # fmt: skip
DESCRIBE_ZH = (
    "[请|]描述[一下|][这张|][图片|图|图像]。", "[图中|图里|图片中|图片里|这张图里|这张图片里|画面里]有什么？", "你看到了什么？",
    "这是什么？", "[这张|]图[片|]里[都|]有[些|]什么[东西|]？", "描述图片[内容|的内容]。", "图片[的|]内容是什么？", "你能看到什么？",
    "[图中|图片上]画了什么？", "用一句话描述这张[图|图片]。", "介绍一下这张图片。", "说说图里有什么。", "图片显示了什么？",
)  # fmt: skip
READ_EN = (
    "What does [it|the text|the sign|the picture|the image|this] say?", "Read the [text|word|number|sign].",
    "What [text|word|number] is [shown|written|printed|in the picture|in the image|this|there|displayed]?",
    "What is written [here|in the picture|in the image|there|on it]?", "[Transcribe|Extract|OCR] the text[| in the image| in this picture].",
    "What [letters|characters|digits] do you see?", "Read [this|it|it to me|the picture].", "What can you read[| here]?",
    "What is the [number|word|text][| in the picture| in the image]?", "Which [number|word] [is it|is shown|do you see]?",
    "Can you read the [text|word|number]?", "Recognize the text.", "What [number|word] does the [picture|image] show?",
)  # fmt: skip
READ_ZH = (
    "[图中|图里|图片上|图片里|上面|这里]写[着|了][什么|什么字|什么文字]？", "[读出|识别|提取][图中|图片中|图片里|]的[文字|字|数字|内容]。",
    "[图中|图片中|图里]的[文字|数字|字|单词]是什么？", "[图中|图里]是什么[数字|字|文字|单词]？", "这是什么[数字|字|单词]？", "[请读|读][一下|]图中的[文字|字]。",
    "图片[上|里]有什么[文字|字|数字]？", "上面的[文字|字|数字]是[什么|多少]？", "写的是什么？", "图中的数字是多少？", "识别文字。",
)  # fmt: skip
BOX_EN = (
    "[Draw|Give|Return|Output|Show] [a|the] [bounding box|box] [of|for|around] {ref}.", "Box {ref}.", "[Locate|Detect|Ground|Find] {ref}.",
    "[Locate|Detect|Find] {ref} [with|and give] a [bounding box|box].", "Where is {ref}? [Answer with|Give|Output] a [bounding box|box].",
    "What are the [box |bounding box |]coordinates of {ref}?", "Frame {ref}.", "[Mark|Point out] {ref} with a box.",
    "Give me the bounding box [of|for] {ref}.", "Output the bounding box coordinates of {ref}.",
)  # fmt: skip
BOX_ZH = (
    "[框出|框选|用框标出|标出|圈出]{ref}[的位置|]。", "[检测|定位]{ref}。", "给出{ref}的[边界框|坐标|检测框|框|位置框]。", "{ref}的[坐标|边界框]是什么？",
    "[请|]用[边界框|框]标出{ref}。", "输出{ref}的[边界框|坐标]。", "找到{ref}并[框出来|给出坐标]。", "[图中|图里]{ref}的坐标是多少？",
)  # fmt: skip
BACKGROUND_EN = (
    "[What|Which] colo[u|]r is the background?", "[What is|What's] the background colo[u|]r?",
    "[What is|Name] the colo[u|]r of the background[?|.]",
)  # fmt: skip
BACKGROUND_ZH = ("背景是什么颜色[的|]？", "背景[的|]颜色是什么？", "[图片|图]的背景是什么颜色？")

IT_COLOUR = (
    "[What|Which] colo[u|]r [is|was] it?", "And [its|the] colo[u|]r?", "What about the colo[u|]r?",
    "What colo[u|]r?", "What [is|was] its colo[u|]r?", "And what colo[u|]r is it?",
)  # fmt: skip
IT_COLOUR_ZH = (
    "它是什么颜色[的|]？",
    "[那|]颜色呢？",
    "什么颜色[的|]？",
    "它的颜色是什么？",
    "是什么颜色的？",
    "那它是什么颜色？",
)
IT_SHAPE = (
    "[What|Which] shape [is|was] it?",
    "And [its|the] shape?",
    "What about the shape?",
    "What [is|was] its shape?",
)
IT_SHAPE_ZH = ("它是什么形状[的|]？", "[那|]形状呢？", "它的形状是什么？", "是什么形状？")
IT_PLACE = (
    "Where [is|was] it?",
    "And where is it?",
    "Where is it in the picture?",
    "And its position?",
)
IT_PLACE_ZH = ("它在哪[里|儿]？", "[那|]位置呢？", "它在什么位置？", "在哪里？")
IT_BOX = ("[Draw|Give me] [a|its] [bounding |]box[.| for it.]", "Box it.", "And its bounding box?")
IT_BOX_ZH = ("框出它。", "它的坐标呢？", "给出它的边界框。", "把它框出来。")
AND_OTHER = ("And {ref}?", "What about {ref}?", "How about {ref}?")
AND_OTHER_ZH = ("那{ref}呢？", "{ref}呢？")
